"""Training and evaluation of one run; `normlab.train` is the front door."""
