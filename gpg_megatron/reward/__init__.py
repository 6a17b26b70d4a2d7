"""The reward room: (prompt, completion) -> Reward, in processes that can be killed."""
