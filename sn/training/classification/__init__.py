"""Image classification: data, models, evaluation, bilevel control parameters."""
