"""Several replicas of one base behind one address, on Ray Serve. The only room that imports Ray."""
