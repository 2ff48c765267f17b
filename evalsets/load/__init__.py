"""How fast an endpoint is under load: requests that come as people's do, and what each of them waited for."""
