"""release-guard: immunize a model before release, refuse to publish what does not resist."""

__version__ = "0.1.0"
SUITE = "2.1"  # version of attacks, splits and rules together; part of every trial's key
