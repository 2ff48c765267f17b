"""Serving: OpenAI's routes over HTTP (`gateway`), the engines behind them (`backends`), our own engine (`torch`)."""
