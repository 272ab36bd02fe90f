//! Boxes and sessions: lifecycle, driver tasks, agent client, recovery.
