"""Remove and retrain on scenes: ``captum-m2ib benchmark roar``."""
