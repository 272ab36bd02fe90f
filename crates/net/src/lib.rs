//! Pod networking: CNI execution, network namespaces, taps and traffic redirection.
