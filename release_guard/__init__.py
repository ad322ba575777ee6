"""release-guard: immunize a model before release, refuse to publish what does not resist."""

__version__ = "0.1.0"
