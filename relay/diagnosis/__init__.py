"""Why a source or receiver refuses a request, for `relay verify`, `relay explain` and refused requests."""
