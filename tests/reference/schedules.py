"""A curriculum in the hands of a test."""


class ChosenDirections:
    """A schedule whose active directions a test sets, also between two updates."""

    def __init__(self, names):
        self.names = names

    def active(self, update):
        return tuple(self.names)

    def next_boundary(self, update):
        return None
