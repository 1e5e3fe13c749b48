"""Pages for people: clients of the API without weights, and without state except that of each visitor."""
