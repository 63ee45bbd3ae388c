"""Studies fetched from their holders and delivered to those who asked.

A *flight* fetches one study into the store, once, for however many want it; a
*delivery* sends to one destination what the flight brings, as it comes. They
meet in the store, so that a slow workstation never holds up a source::

    coordinator   one C-MOVE or C-GET from its identifier to its final status
      request     what was asked for; pure
      locate      which archives hold it
      relay       the part that the local PACS sends itself
      persons     who the patients are whom sources name
      delivery    from the store to one destination
      localize    the right patient, and local values on the way there
      spliced     readers of rewritten instances
      tally       counts and the final status; pure
      disclosure  what is recorded of it; pure
    flights       the flights under way, and what failed lately
      flight      one study: what is held, who waits for it
      subscription  what one of those sees of it
      leg         one study at one holder: what is claimed, and the orders
      catalogue   what one holder lists of it, and the asking for it
      manifest    which instances a holder says exist
      batches     what is missing, as orders; pure
      selection   a study, some series or some instances; pure
    arrivals      the door through which sources' instances come in
"""
