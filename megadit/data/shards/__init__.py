"""WebDataset tars: written, indexed, checked, and read by sample number like any other set."""
