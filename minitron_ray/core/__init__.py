"""What everything else stands on: errors, kinds, YAML with positions, units, fingerprints, events."""
