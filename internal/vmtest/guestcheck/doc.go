// Package guestcheck holds the first tests of every guest: that its kernel has
// TLS, and that what it seals and opens is what RFC 8446 says, computed here with
// the standard library. They use no other package of the project, so when they
// fail the guest is at fault.
package guestcheck
