"""Searches over steps, precisions and backends."""
