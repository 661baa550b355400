//go:build race

package e2e

// raceEnabled: the programs under test are built with the race detector, too.
const raceEnabled = true
