"""Detection on COCO files: data, detectors, evaluation, pictures."""
