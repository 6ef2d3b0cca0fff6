"""What to train: one file a data set, `get_config(choices) -> ConfigDict`."""
