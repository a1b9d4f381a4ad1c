"""Everything that brings a stored event to its destinations."""
