"""The proof: baselines, measurements, checks, the report and the model card."""
