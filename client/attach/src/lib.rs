//! What an application process shares with the agent.
