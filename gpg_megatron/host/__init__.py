"""What a process of a run needs from its host: device, collectives, network, an end."""
