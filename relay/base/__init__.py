"""Small tools that every part uses: time, ids, units, rates, text."""
