"""Repairs that keep the float function and make it easier to quantize."""
