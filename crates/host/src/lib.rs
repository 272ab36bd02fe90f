//! What both host programs share: configuration, installed layout, composition, doctor.
