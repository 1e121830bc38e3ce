"""The explorer: every layer of a model on the images of a store, side by side, moved by a slider."""
