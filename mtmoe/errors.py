"""The errors that a caller may want to tell apart; everything else is a ValueError or a bug."""


class MtmoeError(Exception):
    """Something the user can mend: the text says what was given, what is allowed and the way out."""


class ConfigError(MtmoeError):
    """A configuration file or a combination of options that cannot work."""


class DataError(MtmoeError):
    """Text or prepared data that is missing, damaged or not what it claims to be."""


class UnknownLanguage(MtmoeError):
    """A language code that no table has, or that a model does not translate."""


class CheckpointError(MtmoeError):
    """A checkpoint or model folder that is missing, damaged, unsafe or of another kind."""
