"""The fault simulator: the real services on a virtual clock, a simulated network and a simulated store.

One seed decides everything: who crashes, which message is late, when the store fails. What runs is the
product's own code (leadership, scheduler, deliveries, gateway, worker's driver, client's transcript); what
is simulated is the clock, the wire, the store's server and the model.
"""
