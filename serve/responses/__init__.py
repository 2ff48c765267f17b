"""OpenAI's Responses API in terms of a chat: requests become chat requests, answers are made of replies."""
