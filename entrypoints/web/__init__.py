"""Pages for people: clients of the API that hold no weights and no state but each visitor's own."""
