"""The parts of the command line's verbs that are more than one call. Only `zoo.cli` imports them."""
