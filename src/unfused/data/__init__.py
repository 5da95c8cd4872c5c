"""From files to tensors: decoding, manifests, quarantine, splits, the feature cache."""
