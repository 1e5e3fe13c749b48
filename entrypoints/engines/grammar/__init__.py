"""Grammars (GBNF) of answers, for the engines that generate under one: llama.cpp and transformers."""
