"""The catalog's schema, one Alembic revision a change."""
