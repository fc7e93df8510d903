"""What the tests, the demo and the benches share to run real vLLM: a tiny model, engines, servers, clients."""
