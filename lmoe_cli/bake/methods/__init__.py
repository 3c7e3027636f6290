"""Ways to combine task vectors, one file each, on true deltas per tensor and never on factors."""
