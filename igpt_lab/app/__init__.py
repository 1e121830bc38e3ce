"""What a person touches: commands, the explorer, the report, the notebooks."""
