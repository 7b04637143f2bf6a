"""Methods on pairs of one's own: ``captum-m2ib benchmark pairs``."""
