"""Why a source or a receiver refuses a request: for `relay verify`, `relay explain`, and refused requests."""
