"""Finding the signs of a basis that nobody recorded again, from a little data of the task."""
