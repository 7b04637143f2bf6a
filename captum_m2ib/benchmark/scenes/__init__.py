"""Every method on drawn scenes whose truth is known: ``captum-m2ib benchmark scenes``."""
