"""InfoDisent's maps of photographs beside Grad-CAM and Integrated Gradients, on one classifier."""
