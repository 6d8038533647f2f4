"""Raw rows → records: kind and content, or the reason why a row is none."""
