"""Two plain routers, as an example of how a package brings some."""
