"""The configuration: sections and their rules, read from YAML and a.b=value overrides."""
