"""What everything stands on: artifacts and their files, signatures, errors, settings."""
