"""Where results lie: ids, files that appear whole, leases, stage folders. No torch."""
