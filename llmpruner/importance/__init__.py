"""Importance: how much each unit matters."""
