"""From flags to a trained adapter: loss, schedule, engine, callbacks, the run itself."""
