"""The benchmark on photographs in COCO's format (``captum-m2ib benchmark photos``)."""
