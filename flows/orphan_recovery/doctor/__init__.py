"""The doctor: whether a target is fit to be swept. Each file asks about one thing, and reads."""
